"""The run, whatever the program and the method: plan, schedule, cost, canvas, extrapolation."""
