"""dino_kit"""
