"""clustersim: discrete-event simulator of GPU clusters for Mixture-of-Experts models."""
