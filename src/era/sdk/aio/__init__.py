"""The SDK for asyncio: what a program that uses many sessions at a time calls. `era.sdk.sync` is made from it."""
