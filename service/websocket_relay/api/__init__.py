"""The HTTP side: one router for each thing that can be asked for."""
