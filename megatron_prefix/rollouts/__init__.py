"""Where groups of responses come from: engines, the files they read, and rewards."""
