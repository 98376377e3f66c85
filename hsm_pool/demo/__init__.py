"""The main job, end to end, on real processes; and the workload that chaos runs share with it."""
