"""What all rooms agree on: settings, artifacts, records, errors, and the one door to Ray."""
