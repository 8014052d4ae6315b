"""Small programs that run once; optimized ones are run by the tests of training and of the commands."""

from tests.optimization import compiled_fast as compiled_fast
