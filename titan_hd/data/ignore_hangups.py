"""Imported by a fork server: it, and what it forks, outlive the terminal. The trainer answers SIGHUP."""

import signal

signal.signal(signal.SIGHUP, signal.SIG_IGN)
