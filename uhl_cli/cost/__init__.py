"""What an adapter costs on a host: FLOPs, memory, and the plan that holds a limit."""
