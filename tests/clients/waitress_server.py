"""`gdlib.serve.wsgi:application` on gdlib's own server, for the settings of the environment that its command line does not take."""

import signal
import sys

from gdlib.serve.server import Server
from gdlib.serve.wsgi import application

if __name__ == "__main__":
    server = Server(application, port=int(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.run()
    server.close()
