"""The memory engine: where a run's weights, activations and adapters live, and how they get to the device in time."""
