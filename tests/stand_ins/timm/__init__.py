"""Stands in for timm, of which Detectron2's ViT, Swin and MViT use two small classes."""
