"""The parts around a run in a deployment: SuperLink, TLS front, registered keys, and the grid."""
