"""Operations with a gradient written by hand, on arrays alone."""
