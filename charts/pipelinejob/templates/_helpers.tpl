{{/* Name of the installation's objects. */}}
{{- define "pipelinejob.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that find the operator's pods. The first is the one that the NetworkPolicy of a job admits. */}}
{{- define "pipelinejob.podLabels" -}}
app.kubernetes.io/name: pipelinejob-operator
app.kubernetes.io/component: operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of every object. */}}
{{- define "pipelinejob.labels" -}}
{{ include "pipelinejob.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Reference of an image: (dict "image" .Values.x.image "chart" .Chart) */}}
{{- define "pipelinejob.image" -}}
{{ .image.repository }}:{{ .image.tag | default .chart.AppVersion }}
{{- end -}}

{{/* The operator's service account as the subject of a binding. */}}
{{- define "pipelinejob.subject" -}}
- kind: ServiceAccount
  name: {{ include "pipelinejob.name" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}
