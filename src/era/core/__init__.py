"""The rules of ERA, free of frameworks: sessions, runs, state, snapshots, and the ports they need."""
