"""How a notebook's kernel is reached, and kernels that are forked from a process which has imported everything.

A forked one starts in a fraction of a second, not in six. For drawing alone: a process that is forked after torch has
computed must not compute with it again.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import pkgutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint

from ipykernel.kernelapp import IPKernelApp
from IPython import get_ipython
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner
from traitlets.config import Application, Config

import study.chapters

NAME = "forked"


def reached_through(socket: str) -> Config:
    """Settings with which a kernel is reached through files of these first letters, not through ports.

    Jupyter's default is ports that are free when it looks: another process may take one before the kernel does.
    """
    return Config(KernelManager={"transport": "ipc", "ip": socket})


@contextmanager
def forked() -> Iterator[None]:
    """Within this, kernels of this process and of its forks are forks too, with what the notebooks import imported before."""
    for module in pkgutil.iter_modules(study.chapters.__path__):
        importlib.import_module(f"study.chapters.{module.name}")
    factory = KernelProvisionerFactory.instance()
    before = factory.default_provisioner_name
    factory.provisioners[NAME] = EntryPoint(NAME, f"{__name__}:ForkedKernel", factory.GROUP_NAME)
    factory.default_provisioner_name = NAME
    try:
        yield
    finally:
        factory.default_provisioner_name = before


class Forked:
    """A child of this process, with what a kernel's provisioner asks of `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        return self._waited(os.WNOHANG)

    def wait(self) -> int | None:
        return self._waited(0)

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


class ForkedKernel(LocalProvisioner):
    """Starts a kernel as a fork of this process; the command's arguments say where it listens."""

    async def launch_kernel(self, cmd: list[str], **kwargs) -> dict:
        parent, arguments = os.getpid(), cmd[cmd.index("-f") :]
        pid = os.fork()
        if pid == 0:
            _serve([*arguments, f"--IPKernelApp.parent_handle={parent}"], kwargs.get("cwd", "."), kwargs["env"])
        self.process = Forked(pid)
        self.pid = pid
        return self.connection_info


def _serve(arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    """The child's life: a kernel that ends with its parent; never returns."""
    status = 1
    try:
        os.setsid()  # Ctrl-C is the runner's
        os.chdir(cwd)
        os.environ.update(env)
        asyncio.set_event_loop(asyncio.new_event_loop())  # the parent's own runs in the parent
        for own in (get_ipython(), Application._instance):  # where the parent itself is IPython
            if own is not None:
                type(own).clear_instance()
        IPKernelApp.launch_instance(argv=arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
