"""What a run will need: parameters, memory by part, steps and time."""
