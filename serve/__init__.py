"""The HTTP service: a gateway that speaks HTTP and replicas that own a model."""
