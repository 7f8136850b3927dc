"""What the paper compares models by: functions that return data, and drawing."""
