"""Public test tools: real Consul agents, real instances that fail on command, load, and pytest fixtures of them."""
