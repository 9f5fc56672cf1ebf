"""A pytest plugin: runs the tests that another pytest names over a socket, and sends back their reports.

See conftest.py. Each message is one line of JSON: a test's id in, its reports out, and null behind the last one.
"""

import json
import os
import socket

_stream = socket.socket(fileno=int(os.environ["ZINIT_INTERPRETER_SOCKET"])).makefile("rw")


def _send(message):
    print(json.dumps(message), file=_stream, flush=True)


def pytest_runtestloop(session):
    if session.testsfailed:  # a file that cannot be imported: pytest prints why, and the other side shows it
        raise session.Interrupted("errors during collection")
    items = {item.nodeid: item for item in session.items}
    for line in _stream:
        item = items[json.loads(line)]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        _send(None)
    return True


class _Reporter:
    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        _send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def pytest_configure(config):
    config.pluginmanager.register(_Reporter(config))
