"""The Helm chart and the manifests."""
