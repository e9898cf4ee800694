"""What a run is told: settings as given, and resolved; presets; registries of what has a name."""
