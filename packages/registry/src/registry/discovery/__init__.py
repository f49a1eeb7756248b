"""Who is there, and whom to ask: from a service's name to an answer. Knows no Consul."""
