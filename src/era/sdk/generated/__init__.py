"""What the SDK has of the models of the HTTP contract, made by scripts/sdk_answers.py."""
