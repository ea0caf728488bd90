"""What clients send and get: request bodies and answers, with the names and shapes of the HTTP contract.

`…Body` models validate requests: strict types, unknown fields refused. `…Answer` models only document answers in /docs.
The answers themselves are plain dicts, made by the `…_answer` functions beside the models, because validating them
again would cost time; tests compare the two.
"""
