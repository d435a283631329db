"""Keras layers that compute in float32 where half precision is not enough."""

from keras_mp.layers.attention.grouped_query import GroupedQueryAttention
from keras_mp.layers.attention.multi_head import MultiHeadAttention
from keras_mp.layers.attention.single_head import AdditiveAttention, Attention
from keras_mp.layers.conv.convolution import Conv1D, Conv2D, Conv3D
from keras_mp.layers.conv.depthwise import DepthwiseConv1D, DepthwiseConv2D
from keras_mp.layers.conv.separable import SeparableConv1D, SeparableConv2D
from keras_mp.layers.conv.transposed import Conv1DTranspose, Conv2DTranspose, Conv3DTranspose
from keras_mp.layers.core.average import Average
from keras_mp.layers.core.dense import Dense, EinsumDense
from keras_mp.layers.core.dot import Dot
from keras_mp.layers.core.dropout import (
    AlphaDropout,
    Dropout,
    GaussianDropout,
    GaussianNoise,
    SpatialDropout1D,
    SpatialDropout2D,
    SpatialDropout3D,
)
from keras_mp.layers.core.embedding import Embedding
from keras_mp.layers.core.float32 import Float32
from keras_mp.layers.core.head import Head
from keras_mp.layers.core.masking import Masking
from keras_mp.layers.core.prelu import PReLU
from keras_mp.layers.core.repeating import RepeatVector, UpSampling1D, UpSampling3D
from keras_mp.layers.core.reversible_embedding import ReversibleEmbedding
from keras_mp.layers.core.variables import taking_variables as _taking_variables
from keras_mp.layers.normalization.batch_normalization import BatchNormalization
from keras_mp.layers.normalization.feature_normalization import Normalization
from keras_mp.layers.normalization.normalization import GroupNormalization, LayerNormalization, RMSNormalization
from keras_mp.layers.normalization.spectral_normalization import SpectralNormalization
from keras_mp.layers.normalization.unit_normalization import UnitNormalization
from keras_mp.layers.pooling.max_pooling import MaxPooling1D, MaxPooling2D, MaxPooling3D
from keras_mp.layers.pooling.pooling import (
    AveragePooling1D,
    AveragePooling2D,
    AveragePooling3D,
    GlobalAveragePooling1D,
    GlobalAveragePooling2D,
    GlobalAveragePooling3D,
)
from keras_mp.layers.recurrent.cells import GRUCell, LSTMCell, SimpleRNNCell, StackedRNNCells
from keras_mp.layers.recurrent.conv_lstm import ConvLSTM1D, ConvLSTM2D, ConvLSTM3D
from keras_mp.layers.recurrent.layers import GRU, LSTM, RNN, SimpleRNN
from keras_mp.layers.resizing import Resizing, UpSampling2D
from keras_mp.layers.softmax import Softmax

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AlphaDropout",
    "Attention",
    "Average",
    "AveragePooling1D",
    "AveragePooling2D",
    "AveragePooling3D",
    "BatchNormalization",
    "Conv1D",
    "Conv1DTranspose",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Conv3DTranspose",
    "ConvLSTM1D",
    "ConvLSTM2D",
    "ConvLSTM3D",
    "Dense",
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "Dot",
    "Dropout",
    "EinsumDense",
    "Embedding",
    "Float32",
    "GRUCell",
    "GaussianDropout",
    "GaussianNoise",
    "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
    "GlobalAveragePooling3D",
    "GroupNormalization",
    "GroupedQueryAttention",
    "Head",
    "LSTMCell",
    "LayerNormalization",
    "Masking",
    "MaxPooling1D",
    "MaxPooling2D",
    "MaxPooling3D",
    "MultiHeadAttention",
    "Normalization",
    "PReLU",
    "RMSNormalization",
    "RepeatVector",
    "Resizing",
    "ReversibleEmbedding",
    "SeparableConv1D",
    "SeparableConv2D",
    "SimpleRNN",
    "SimpleRNNCell",
    "Softmax",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "SpectralNormalization",
    "StackedRNNCells",
    "UnitNormalization",
    "UpSampling1D",
    "UpSampling2D",
    "UpSampling3D",
]

for _name in __all__:
    _taking_variables(globals()[_name])
