"""Fixtures of all tests: the model families, made once."""

import pytest
import torch

import families
import laws

LONGEST = ("test_study.py", "test_profiles.py", "test_runs.py")  # minutes each: first, or one worker ends long after the other


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", params=families.FAMILIES, ids=lambda make: make.__name__)
def family(request):
    """(model, inputs of a ragged left-padded batch of two), for every supported family."""
    return families.ready(request.param)


@pytest.fixture
def shown(monkeypatch):
    """Where the study is installed: scenes (n, seed) whose n patches show something at random, for the strategy that knows."""
    if laws.STUDY:

        def render(scene):
            n, seed = scene
            mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) > 0.5
            return type("Picture", (), {"shown": mask.numpy()})

        monkeypatch.setattr("study.controls.render", render)
