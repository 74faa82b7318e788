"""Kernels that are forked from a process which has imported everything."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.provisioning import KernelProvisionerFactory

from study import kernels

PID = "import os, sys; print(os.getpid(), 'study.chapters.recipes' in sys.modules)"


def executed(tmp_path, *cells: str) -> nbformat.NotebookNode:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python", "language": "python"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    quiet = {"progress_bar": False, "extra_arguments": ["--log-level=CRITICAL"], "cwd": str(tmp_path)}
    with TemporaryDirectory() as folder:  # the path of a socket is at most a hundred letters long; that of tmp_path may be more
        config = kernels.reached_through(f"{folder}/kernel")
        return papermill.execute_notebook(str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), config=config, **quiet)


def ended(pid: int) -> bool:
    """Whether a process ends within ten seconds; a child that nobody waited for counts as ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_a_forked_kernel_has_everything_imported_works_where_it_is_told_and_ends(tmp_path):
    before = KernelProvisionerFactory.instance().default_provisioner_name
    with kernels.forked():
        cells = executed(tmp_path, PID, "print(os.getcwd())").cells
    pid, imported = cells[0].outputs[0].text.split()
    assert imported == "True" and int(pid) != os.getpid()
    assert cells[1].outputs[0].text.strip() == str(tmp_path)
    assert ended(int(pid))
    assert KernelProvisionerFactory.instance().default_provisioner_name == before


def test_two_kernels_of_one_process_do_not_see_each_other(tmp_path):
    with kernels.forked():
        executed(tmp_path, "import study.intervals; study.intervals.MATTERS = 5")
        assert executed(tmp_path, "import study.intervals; print(study.intervals.MATTERS)").cells[0].outputs[0].text == "0.01\n"


@pytest.mark.parametrize("how", [kernels.forked, nullcontext], ids=["forked", "started"])
def test_a_kernel_is_told_no_port(tmp_path, how):
    """Another process may take a port that was free when Jupyter chose it."""
    with how():
        (cell,) = executed(tmp_path, "import ipykernel\nprint(ipykernel.get_connection_info(unpack=True)['transport'])").cells
    assert cell.outputs[0].text.strip() == "ipc"


def test_a_kernel_is_forked_from_ipython_too(tmp_path):
    shell = InteractiveShell.instance()
    try:
        with kernels.forked():
            assert executed(tmp_path, "print(type(get_ipython()).__name__)").cells[0].outputs[0].text == "ZMQInteractiveShell\n"
        assert InteractiveShell.instance() is shell
    finally:
        InteractiveShell.clear_instance()


def test_what_fails_in_a_forked_kernel_is_reported(tmp_path):
    with kernels.forked(), pytest.raises(papermill.PapermillExecutionError, match="no such thing"):
        executed(tmp_path, "raise ValueError('no such thing')")


def test_a_forked_kernel_ends_with_the_process_that_it_is_for(tmp_path):
    script = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from study import kernels
        from test_kernels import executed
        with kernels.forked():
            executed(Path({str(tmp_path)!r}), "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(100)")
    """
    process = subprocess.Popen([sys.executable, "-c", "\n".join(line[8:] for line in script.splitlines())])
    for _ in range(600):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ended(int((tmp_path / "pid").read_text()))


def test_a_kernel_that_is_killed_says_so():
    pid = os.fork()
    if pid == 0:
        time.sleep(100)
        os._exit(0)
    child = kernels.Forked(pid)
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL == child.poll()
    child.send_signal(signal.SIGKILL)  # to a process that has ended: nothing
