"""The Python SDK: `from era import Era, AsyncEra`. A client of the HTTP API that needs nothing of the server.

Its public methods are written once, as coroutines, in `aio`. `sync` is made of these by scripts/blocking.py: without
`async` and `await`, and with the names of classes without `Async`. A test compares. What both need and doesn't wait for
anything stands beside them:

    calls.py      a request, before it is sent
    answers.py    the objects that answers become
    events.py     the events of streams
    generated     the fields of both, made by scripts/sdk_answers.py of the server's models
    retries.py    which failed calls are made again, and when
    options.py    the keyword arguments that many methods share, and the JSON that they become
    sugar.py      what only one of the two has: `s.data["n"]`, and `async with era.session(…)`
    blocking.py   requests over http.client: it takes a tenth of the time that httpx takes to import
    waiting.py    requests over httpx, for asyncio
"""
