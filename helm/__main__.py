"""`make chart`: write what is generated."""

from helm.generate import write
from tests.support.helm import newest_helm

write(newest_helm().manifests)
