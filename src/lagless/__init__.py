"""Train for the model you return: averaged weights without the lag."""
