"""Sessions as tools of frameworks of agents: a file for each, which imports that framework."""
