"""The topology page: who is there, who asks whom and why, as Consul and every instance tell it."""
