"""What operators see of requests: records, metrics, traces. Text only where it was asked for."""
