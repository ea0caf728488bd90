"""A session with all that belongs to it as one archive, to be moved or looked at; format.py tells what is in it."""
