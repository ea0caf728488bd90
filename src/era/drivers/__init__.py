"""Drivers make, bound, talk to and remove sandboxes: with bubblewrap, or with gVisor inside of bubblewrap."""
