"""What an adapter costs on a host: FLOPs, memory, and the plan that keeps a FLOP limit."""
