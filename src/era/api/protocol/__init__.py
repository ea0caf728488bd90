"""HTTP and WebSocket below any route: parsing, connections, upgrades, answers."""
