"""The frozen base and its adapters: quantise, build, adapt."""
