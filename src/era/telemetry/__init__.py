"""What operators see of a service: its log, its metrics, its traces. Each is made of the notes of core/telemetry.py."""
