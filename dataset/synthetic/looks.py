"""How lights, floors and walls look: names and linear-light colours."""

Vector = tuple[float, float, float]

LIGHTS = ("sun", "overcast", "lamp", "evening")
ROOM_FLOORS = ("planks", "checker", "tiles", "stripes", "speckle", "plain")
GROUNDS = ("grass", "sand", "paving", "checker", "stripes")
PATTERNS = ("plain", "stripes", "two_tone")
WALLS = ("plain", "stripes", "panel")

# Degrees above the horizon, apparent radius in degrees, colours of the key light, the sky light, zenith and horizon.
LIGHT_LOOKS: dict[str, dict] = {
    "sun": {
        "rise": (34, 56),
        "size": 2.6,
        "key": (0.98, 0.94, 0.87),
        "sky": (0.46, 0.49, 0.54),
        "zenith": (0.10, 0.30, 0.72),
        "horizon": (0.62, 0.78, 0.92),
    },
    "overcast": {
        "rise": (64, 80),
        "size": 17.0,
        "key": (0.50, 0.50, 0.50),
        "sky": (0.60, 0.61, 0.63),
        "zenith": (0.50, 0.55, 0.62),
        "horizon": (0.80, 0.82, 0.84),
    },
    "lamp": {
        "rise": (46, 68),
        "size": 4.5,
        "key": (1.00, 0.86, 0.68),
        "sky": (0.43, 0.40, 0.39),
        "zenith": (0.012, 0.018, 0.07),
        "horizon": (0.09, 0.08, 0.16),
    },
    "evening": {
        "rise": (14, 22),
        "size": 2.6,
        "key": (1.05, 0.85, 0.64),
        "sky": (0.42, 0.41, 0.50),
        "zenith": (0.13, 0.16, 0.42),
        "horizon": (0.98, 0.52, 0.24),
    },
}

# Two albedos a floor is made of, each itself a line between two looks.
FLOOR_LOOKS: dict[str, tuple[tuple[Vector, Vector], tuple[Vector, Vector]]] = {
    "planks": (((0.42, 0.24, 0.12), (0.62, 0.42, 0.24)), ((0.30, 0.16, 0.08), (0.50, 0.32, 0.17))),
    "checker": (((0.66, 0.63, 0.58), (0.56, 0.62, 0.66)), ((0.20, 0.21, 0.25), (0.30, 0.22, 0.20))),
    "tiles": (((0.58, 0.54, 0.48), (0.42, 0.52, 0.56)), ((0.26, 0.24, 0.22), (0.78, 0.78, 0.76))),
    "stripes": (((0.62, 0.56, 0.46), (0.58, 0.60, 0.64)), ((0.40, 0.26, 0.24), (0.24, 0.34, 0.44))),
    "speckle": (((0.46, 0.44, 0.42), (0.60, 0.55, 0.48)), ((0.30, 0.28, 0.28), (0.42, 0.36, 0.30))),
    "plain": (((0.56, 0.52, 0.46), (0.44, 0.48, 0.52)), ((0.56, 0.52, 0.46), (0.44, 0.48, 0.52))),
    "grass": (((0.19, 0.32, 0.08), (0.27, 0.38, 0.11)), ((0.11, 0.21, 0.05), (0.17, 0.28, 0.07))),
    "sand": (((0.66, 0.51, 0.32), (0.72, 0.58, 0.40)), ((0.55, 0.41, 0.25), (0.60, 0.46, 0.29))),
    "paving": (((0.46, 0.45, 0.44), (0.52, 0.49, 0.45)), ((0.27, 0.26, 0.25), (0.32, 0.29, 0.26))),
}
FLOOR_SCALE = {
    "planks": 0.26,
    "checker": 0.55,
    "tiles": 0.6,
    "stripes": 0.5,
    "speckle": 0.13,
    "plain": 1.0,
    "grass": 0.3,
    "sand": 0.5,
    "paving": 0.7,
}
WALL_LOOKS = (
    (0.72, 0.69, 0.63),
    (0.56, 0.65, 0.70),
    (0.62, 0.69, 0.56),
    (0.72, 0.58, 0.53),
    (0.66, 0.60, 0.72),
    (0.74, 0.66, 0.48),
)
