"""`make chart`: write the generated files."""

from helm.generate import write
from tests.support.helm import newest_helm

write(newest_helm().manifests)
