"""Installing us adds models that HELM does not know, and changes nothing else: light, silent, and hijacking nobody."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

REGISTRIES = """
from helm.benchmark.config_registry import register_builtin_configs_from_helm_package
from helm.benchmark import model_deployment_registry as d, model_metadata_registry as m, tokenizer_config_registry as t
"""


def python(program: str, cwd: Path, *path: Path) -> Any:
    """Run a program in a fresh process and return the JSON that it prints last."""
    root = Path(__file__).resolve().parents[2]
    lines = f"import sys; sys.path[:0] = {[str(p) for p in (*path, root)]!r}\n{REGISTRIES}\n{textwrap.dedent(program)}"
    done = subprocess.run([sys.executable, "-c", lines], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_light_and_leaves_what_helm_has_as_it_was(tmp_path: Path) -> None:
    seen = python(
        """
        import json
        register_builtin_configs_from_helm_package()
        before = [dict(r) for r in (m.MODEL_NAME_TO_MODEL_METADATA, t.TOKENIZER_NAME_TO_CONFIG,
                                    d.DEPLOYMENT_NAME_TO_MODEL_DEPLOYMENT)]
        defaults = {name: d.get_default_model_deployment_for_model(name) for name in before[0]}
        import flexgen_helm.plugin
        after = (m.MODEL_NAME_TO_MODEL_METADATA, t.TOKENIZER_NAME_TO_CONFIG, d.DEPLOYMENT_NAME_TO_MODEL_DEPLOYMENT)
        print(json.dumps({
            "heavy": [name for name in ("torch", "transformers", "tokenizers") if name in sys.modules],
            "same": all(new[name] is old[name] for new, old in zip(after, before) for name in old),
            "defaults": defaults == {name: d.get_default_model_deployment_for_model(name) for name in defaults},
            "added": [sorted(set(new) - set(old)) for new, old in zip(after, before)],
        }))
        """,
        tmp_path,
    )
    assert seen["heavy"] == []
    assert seen["same"]
    assert seen["defaults"]
    models, tokenizers, deployments = seen["added"]
    sizes = ["1.3b", "125m", "13b", "2.7b", "30b", "350m", "6.7b", "66b", "iml-1.3b", "iml-30b", "iml-max-30b"]
    assert models == [f"facebook/opt-{size}" for size in sizes]
    assert set(tokenizers) == set(models) - {"facebook/opt-66b"}  # that tokenizer is HELM's
    assert deployments == [f"flexgen/opt-{size}" for size in sizes]


def test_a_model_of_the_user_keeps_its_deployments(tmp_path: Path) -> None:
    seen = python(
        """
        import json
        mine = m.get_unknown_model_metadata("facebook/opt-30b")
        m.register_model_metadata(mine)
        spec = d.ClientSpec(class_name="somewhere.Client")
        d.register_model_deployment(d.ModelDeployment(name="mine/opt", client_spec=spec, model_name="facebook/opt-30b"))
        d.register_model_deployment(d.ModelDeployment(name="flexgen/opt-13b", client_spec=spec, model_name="a/b"))
        import flexgen_helm.plugin
        print(json.dumps([
            m.MODEL_NAME_TO_MODEL_METADATA["facebook/opt-30b"] is mine,
            d.get_default_model_deployment_for_model("facebook/opt-30b"),
            "flexgen/opt-30b" in d.DEPLOYMENT_NAME_TO_MODEL_DEPLOYMENT,
            d.DEPLOYMENT_NAME_TO_MODEL_DEPLOYMENT["flexgen/opt-13b"].model_name,
        ]))
        """,
        tmp_path,
    )
    assert seen == [True, "mine/opt", False, "a/b"]


@pytest.mark.parametrize("content", ["print('somebody else')", "raise RuntimeError('two\\nlines')", "import nowhere"])
def test_another_package_called_engine_is_named_in_one_line_with_the_cure(tmp_path: Path, content: str) -> None:
    (tmp_path / "other" / "engine").mkdir(parents=True)
    (tmp_path / "other" / "engine" / "__init__.py").write_text(content)
    seen = python(
        """
        import json, logging
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("helm").addHandler(handler)
        import flexgen_helm.plugin
        try:
            import flexgen_helm.helm.client
        except ImportError as error:
            lines.append(str(error))
        print(json.dumps([lines, len(d.DEPLOYMENT_NAME_TO_MODEL_DEPLOYMENT)]))
        """,
        tmp_path,
        tmp_path / "other",
    )
    (warning, refusal), num_registered = seen
    assert num_registered == 0
    assert warning == f"flexgen_helm registers nothing: {refusal}"
    assert "\n" not in refusal
    assert "`import engine` fails" in refusal or str(tmp_path / "other" / "engine") in refusal
    assert "pip install" in refusal or "uninstall" in refusal


def test_damaged_entries_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flexgen_helm import plugin

    (tmp_path / "model_metadata.yaml").write_text("models: [{name: 3}]")
    monkeypatch.setattr(plugin, "config_directory", lambda: tmp_path)
    monkeypatch.setattr(logging.getLogger("helm"), "propagate", True)
    plugin.register_shipped_models()
    ((level, message),) = {(record.levelname, record.getMessage()) for record in caplog.records}
    assert level == "WARNING"
    assert "registers nothing" in message
    assert "\n" not in message


def test_helm_can_read_the_shipped_entries_and_finds_our_client() -> None:
    from helm.benchmark.model_deployment_registry import ModelDeployment
    from helm.common.object_spec import get_class_by_name

    from flexgen_helm import plugin

    plugin.register_shipped_models()
    from helm.benchmark.model_deployment_registry import get_model_deployment
    from helm.benchmark.model_metadata_registry import get_model_metadata
    from helm.benchmark.tokenizer_config_registry import get_tokenizer_config

    deployment: ModelDeployment = get_model_deployment("flexgen/opt-30b")
    assert get_model_metadata(deployment.model_name or "").num_parameters == 30_000_000_000
    tokenizer = get_tokenizer_config(deployment.tokenizer_name or "")
    assert tokenizer is not None
    assert (tokenizer.end_of_text_token, tokenizer.prefix_token) == ("</s>", "</s>")
    assert get_class_by_name(deployment.client_spec.class_name).__name__ == "FlexGenClient"
    assert deployment.client_spec.args["policy"] == "auto"
