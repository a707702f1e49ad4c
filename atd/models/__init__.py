"""Graphs as models: config and checkpoint to graph, the reference of each op, execution."""
