"""What is asked and when, and what came of it: the same for a real server and a simulated one."""
