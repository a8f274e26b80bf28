{{- define "pipelinejob.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name }}{{ end }}
{{- end }}

{{- /* Which pods are the operator's. The NetworkPolicy of a job admits pods by the first of these labels. */}}
{{- define "pipelinejob.selector" -}}
app.kubernetes.io/name: pipelinejob-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "pipelinejob.labels" -}}
{{ include "pipelinejob.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* Takes (list ROOT IMAGE). */}}
{{- define "pipelinejob.image" -}}
{{- $root := first . }}{{ $image := last . -}}
{{ printf "%s:%s" $image.repository ($image.tag | default $root.Chart.AppVersion) }}
{{- end }}

{{- /* A RoleBinding's or ClusterRoleBinding's subjects. */}}
{{- define "pipelinejob.subjects" -}}
subjects:
  - kind: ServiceAccount
    name: {{ include "pipelinejob.name" . }}
    namespace: {{ .Release.Namespace }}
{{- end }}
