"""Datasets: registration of COCO-format data, and the project's own synthetic dataset."""
