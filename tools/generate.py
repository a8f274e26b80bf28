"""Write every file that is made from the models, or with ``--check`` say which ones are stale.

python -m tools.generate [--check]
"""

import sys
from pathlib import Path

import yaml

from pipelinejob_operator.api import chart, crd, reference, v1alpha1
from tools import conditions

ROOT = Path(__file__).resolve().parents[1]
CHART = Path("charts/pipelinejob")

HEADER = "# Generated from the API models by `make generate`; do not edit.\n"

CHART_CRD = """\
{{{{- if .Values.crds.enabled }}}}
{header}{before}
  annotations:
    {{{{- if .Values.crds.keep }}}}
    helm.sh/resource-policy: keep
    {{{{- end }}}}
    pipelinejob.dev/chart-version: {{{{ .Chart.Version | quote }}}}
{after}{{{{- end }}}}
"""


class _Dumper(yaml.SafeDumper):
    """PyYAML leaves 3e-4 bare, which YAML 1.2 readers such as kubectl take for a number."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="'" if text[:1].isdigit() else None
    ),
)


def files() -> dict[Path, str]:
    """Return the content of each generated file by its path in the project."""
    text = yaml.dump(crd.crd(), Dumper=_Dumper, sort_keys=False, width=120)
    return {
        Path(f"crds/{v1alpha1.GROUP}_{v1alpha1.PLURAL}.yaml"): HEADER + text,
        CHART / "templates" / "crds.yaml": chart_crd(text),
        CHART / "values.yaml": chart.values_yaml(HEADER),
        CHART / "values.schema.json": chart.values_schema(),
        CHART / "README.md": chart.readme(),
        Path("docs/reference/api.md"): reference.page(crd.structural_schema()),
        Path("docs/reference/conditions.md"): conditions.page(),
    }


def chart_crd(text: str) -> str:
    """Wrap the CRD as a template of the chart: Helm never upgrades what is in a chart's ``crds`` folder."""
    before, name, after = text.partition(f"metadata:\n  name: {crd.CRD_NAME}\n")
    escaped = after.replace("{{", "{{ `{{` }}")
    return CHART_CRD.format(header=HEADER, before=before + name.rstrip("\n"), after=escaped)


def stale(root: Path = ROOT) -> list[Path]:
    """Return the generated files that do not hold what the code says."""
    return [path for path, text in files().items() if not (root / path).exists() or (root / path).read_text() != text]


def main() -> None:
    """Write the files, or check them."""
    old = stale()
    if "--check" in sys.argv[1:]:
        if old:
            sys.exit(f"stale: {', '.join(map(str, old))}; run `make generate`")
        return
    for path in old:
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(files()[path])
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
