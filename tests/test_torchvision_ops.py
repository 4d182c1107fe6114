"""torchvision imports beside a torch its operators were not built for."""

from tests.conftest import launch
from utils import torchvision_ops


def test_shim_is_active_exactly_where_the_compiled_operators_do_not_load():
    assert torchvision_ops.ensure_loadable() == (not torchvision_ops.compiled_ops_load())


def test_a_part_can_be_imported_before_torchvision(tmp_path):
    script = "import datasets.registry, torchvision, timm, torch; torch.ops.torchvision.nms; print('fine')"
    done = launch("-c", script, cwd=tmp_path)
    assert done.stdout.strip() == "fine", done.stderr
