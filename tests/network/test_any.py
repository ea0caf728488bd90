from tests.network.conftest import NewSession


def test_tcp(session: NewSession) -> None:
    code = """
import socket, time
for n in range(6):
    t=time.perf_counter()
    sock = socket.create_connection(("203.0.113.10", 9000))
    b=time.perf_counter()
    sock.sendall(b"hello"); sock.recv(10)
    print(f"{(b-t)*1000:.2f} {(time.perf_counter()-b)*1000:.2f}")
t=time.perf_counter()
for n in range(20): socket.getaddrinfo("www.example.test", 80, type=socket.SOCK_STREAM)
print((time.perf_counter()-t)/20*1000, "getaddrinfo ms")
u=socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
t=time.perf_counter()
for n in range(200): u.sendto(b"x",("203.0.113.10",9000))
print((time.perf_counter()-t)/200*1000, "sendto ms")
a=socket.socket(socket.AF_UNIX)
t=time.perf_counter()
for n in range(100):
    try: a.connect("/tmp/x")
    except OSError: pass
print((time.perf_counter()-t)/100*1000, "unix connect ms")
"""
    one = session()
    one.run("1")
    for _ in range(2): print(one.run(code)["stdout"])
    assert 0
