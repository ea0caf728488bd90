"""What clients send and get: request bodies, answers, events. Names and shapes are the HTTP contract's.

Request models are strict and know no unknown fields. Answers are built as plain dicts by the functions beside the
models, which is fast; the models say the same to /docs, and a test holds the two against each other.
"""
