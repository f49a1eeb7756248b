"""The only place that knows Consul: connection, discovery (``resolver``) and presence (``presence``)."""
